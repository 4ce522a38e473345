"""What `lvr-lite export --for hf` writes, read by transformers and by llama.cpp."""
