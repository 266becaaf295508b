"""One file per operation: its formula, checks, backends, autograd and public function."""
