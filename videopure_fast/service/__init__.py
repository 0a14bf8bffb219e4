"""The purifier behind HTTP: clips that are uploaded, and live sources of the server's own."""
