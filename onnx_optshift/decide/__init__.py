"""Which shift to accept: the loss on held-out data, the gate, and how a tolerance is shared out."""
