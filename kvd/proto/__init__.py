"""The messages of `kvd.v1`, generated from kvd.proto by `make proto`."""
