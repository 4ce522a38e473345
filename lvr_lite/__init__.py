"""lvr-lite: latent visual reasoning, from QLoRA fine-tuning to quantized decoding on a device."""

__version__ = "0.1.0"
