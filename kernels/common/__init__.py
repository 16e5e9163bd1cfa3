"""What the ops share that is no kernel: the arguments of a block, example arguments, what is kept of weights."""
