"""Many deltas on one backbone: loading, combining and changing them."""
