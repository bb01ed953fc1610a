"""Files that are whole or absent: complete writes, manifests, scratch files, lists on the disk."""
