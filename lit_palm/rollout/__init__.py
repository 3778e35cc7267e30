"""Prompts to experience: sampling, the KV-cached engine, rewards, advantages, the collector and its loader."""
