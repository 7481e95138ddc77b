"""What a frozen part gives: heads and side networks on it, a cache of it, and the memory that it takes."""
