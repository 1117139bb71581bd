"""What the tests of the executor run: single instructions, and Triton kernels that several tests share."""
