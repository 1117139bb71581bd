"""Code that the executor's tests run: single instructions, and Triton kernels that several tests share."""
