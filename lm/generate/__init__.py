"""Text generation: sampling, a key/value cache, streamed pieces of text and their scores."""
