"""Prompts in vision models and in models of two towers."""
