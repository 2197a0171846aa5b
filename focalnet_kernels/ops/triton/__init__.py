"""What the Triton backends of all ops share. No module here imports Triton before a kernel is launched."""
