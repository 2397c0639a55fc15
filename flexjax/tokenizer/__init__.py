"""Text to token ids and back. The public names of this package, one by one."""

from flexjax.tokenizer.chat_template import ChatTemplate
from flexjax.tokenizer.detokenizer import IncrementalDetokenizer
from flexjax.tokenizer.stop_strings import StopMatcher
from flexjax.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopMatcher", "Tokenizer"]
