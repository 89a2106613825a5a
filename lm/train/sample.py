"""Text that the model writes while it is trained."""

from typing import Any

from lm.data.tokenizers import Tokenizer
from lm.experiment import Config
from lm.generate.generate import Generator
from lm.generate.sampling import Sampling


def sample_text(config: Config, params: Any, tokenizer: Tokenizer) -> str:
    """Continues `config.sample.prompt`; the same parameters give the same text."""
    sample = config.sample
    limit = sample.tokens
    if config.model.positions == "learned":  # the table ends there
        limit = min(limit, config.model.context - len(tokenizer.encode(sample.prompt)) - 1)
    if limit < 1:
        return ""
    sampling = Sampling(temperature=sample.temperature, top_p=sample.top_p, seed=config.run.seed)
    generator = Generator(config.model, params, tokenizer)
    completion = generator.generate([sample.prompt], max_tokens=limit, sampling=sampling)[0]
    return sample.prompt + completion.text
