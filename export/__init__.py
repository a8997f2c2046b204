"""Checkpoint to ONNX to engine, with proof of parity (the Export issue)."""
