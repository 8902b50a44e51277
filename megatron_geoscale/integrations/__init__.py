"""Megatron-GeoScale inside other people's training programs."""
