"""Profiles that come with kvd, one file a model."""
