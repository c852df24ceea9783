"""Pictures of reports: each tells its kinds apart without colour too, and takes the ink of the page it is in."""
