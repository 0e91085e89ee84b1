"""The front door: gRPC service, queue, journals and client library. No Ray, torch, vLLM or transformers in here."""
