"""Matrix products of integer codes on CUDA devices.  Only code.py and launch.py import triton."""
