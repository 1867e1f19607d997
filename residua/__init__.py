"""Capture, store, analyse and replay the activations of transformer models."""
