"""The choice of a backend on a GPU: by times that are data, and only of kernels that were tried."""
