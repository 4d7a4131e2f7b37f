"""A page to play with: how one tensor is rounded, what that does, and one pixel's way in integers."""
