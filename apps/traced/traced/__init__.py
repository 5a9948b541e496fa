"""FSL-SAGE with a trace of who computed when."""
