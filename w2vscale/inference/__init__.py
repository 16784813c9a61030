"""Run a trained model on audio of any length: hidden states, decoding, transcription."""
