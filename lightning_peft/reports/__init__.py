"""What a person reads: tables of parameters, and what a run has come to."""
