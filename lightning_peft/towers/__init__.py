"""Prompts in vision models and in two-tower models."""
