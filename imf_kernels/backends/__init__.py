"""Where kernels run, and how calls reach them."""
