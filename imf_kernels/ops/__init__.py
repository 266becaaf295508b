"""One file an operation: its formula, its checks, its backends, its autograd, its public function."""
