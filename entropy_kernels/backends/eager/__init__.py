"""Plain torch, chunked over rows: the reference in production dress, on any device."""
