"""Models on this machine and on a hub: names, folders, downloads."""
