"""The server side: the segment, gradients, aggregation, and talking to clients."""
