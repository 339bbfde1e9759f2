"""The daemon: store, sessions, planes, and what operators see of them."""
