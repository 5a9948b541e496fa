"""The server side: the segment, passes over it, gradient rules, and talking to clients."""
