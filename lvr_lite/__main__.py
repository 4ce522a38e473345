"""`python -m lvr_lite` is `lvr-lite`."""

from lvr_lite.cli import main

main()
