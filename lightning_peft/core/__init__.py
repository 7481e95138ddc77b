"""What a method needs of a backbone, by torch alone: the graft, the record of what is tuned, the delta."""
