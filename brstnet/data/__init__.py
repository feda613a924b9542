"""Raw slides and count matrices become a store of patches."""
