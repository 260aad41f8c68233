"""A chat endpoint of the OpenAI kind, over the standard library."""

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from internlm2.config import ConfigError

TRIES, SECONDS = 4, 120.0


@dataclass(frozen=True)
class Endpoint:
    """`url` up to /v1, `model` there, and the environment variable with the key (unset: none is sent)."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    pause: float = 1.0  # seconds before a second try, doubled before each further one

    def ask(self, question: str) -> str:
        """The answer to one user turn at temperature 0. ConfigError where the endpoint gives none."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"suite.judge.url={self.url} must begin with http:// or https://.")
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for number in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                return str(content or "")
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429, 500, 502, 503, 504) or number + 1 == TRIES:
                    raise ConfigError(f"suite.judge.url: {address} answers {error.code} {error.reason}.") from error
            except OSError as error:
                if number + 1 == TRIES:
                    raise ConfigError(f"suite.judge.url: {address} cannot be reached: {error}.") from error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ConfigError(f"suite.judge.url: {address} answers with no chat completion.") from error
            time.sleep(self.pause * 2**number)
        raise AssertionError("the last try returns or raises")
