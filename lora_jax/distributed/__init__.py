"""Devices and processes: meshes, where each array lies, runs of several processes."""
