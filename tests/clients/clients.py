"""The Python clients, one function each: it asks what a job says and returns the text of the answer.

`python clients.py NAME` is that client as a program: jobs come as JSON on the lines of standard input, and for each
a line goes out with its answer, or with what was raised. So every client runs with the packages and the environment
that people use it with, and none in another's way. clients.mjs has those for node.

A job has `url` (which ends in /v1), `key`, `question`, `picture` (a data: URL), `stream`, `retries`,
and `cafile`, the certificate to trust; null where the environment says it already.
"""

import asyncio
import base64
import json
import os
import ssl
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

MODEL = "phi-3-vision"


def openai_sync(job) -> str:
    import openai

    with openai.OpenAI(**options(job), http_client=http_client(job, openai.DefaultHttpxClient)) as client:
        reply = client.chat.completions.create(**chat(job))
        return "".join(map(delta, reply)) if job.stream else reply.choices[0].message.content


def openai_async(job) -> str:
    import openai

    async def ask() -> str:
        trusting = http_client(job, openai.DefaultAsyncHttpxClient)
        async with openai.AsyncOpenAI(**options(job), http_client=trusting) as client:
            reply = await client.chat.completions.create(**chat(job))
            return "".join([delta(c) async for c in reply]) if job.stream else reply.choices[0].message.content

    return asyncio.run(ask())


def langchain(job) -> str:
    import openai
    from langchain_openai import ChatOpenAI

    trusting = http_client(job, openai.DefaultHttpxClient)
    model = ChatOpenAI(model=MODEL, **options(job), http_client=trusting)
    return "".join(c.text for c in model.stream(messages(job))) if job.stream else model.invoke(messages(job)).text


def llm(job) -> str:
    """Simon Willison's: no option for a certificate or for retries, so both are as the openai package has them."""
    import llm
    import openai

    openai.OpenAI.__init__.__kwdefaults__["max_retries"] = job.retries
    model = {"model_id": "phi3v", "model_name": MODEL, "api_base": job.url, "api_key_name": "phi3v", "vision": True}
    model["headers"] = options(job)["default_headers"]  # and a list of such models as JSON is YAML, too
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLM_USER_PATH"] = folder
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([model]))
        asked = {"attachments": [llm.Attachment(content=content(job))], "key": job.key or "-", "stream": job.stream}
        return llm.get_model("phi3v").prompt(job.question, **asked).text()


def litellm(job) -> str:
    import litellm

    litellm.suppress_debug_info = True  # or it writes to standard output
    litellm.ssl_verify = job.cafile or True
    given = options(job) | {"model": f"openai/{MODEL}", "extra_headers": options(job)["default_headers"]}
    reply = litellm.completion(**chat(job) | given)
    return "".join(map(delta, reply)) if job.stream else reply.choices[0].message.content


def llama_index(job) -> str:
    import openai
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    given = options(job)
    given |= {"api_base": given.pop("base_url"), "temperature": 0, "is_chat_model": True}
    model = OpenAILike(model=MODEL, **given, http_client=http_client(job, openai.DefaultHttpxClient))
    asked = [ChatMessage(role="user", blocks=[TextBlock(text=job.question), ImageBlock(image=content(job))])]
    if job.stream:
        return "".join(chunk.delta or "" for chunk in model.stream_chat(asked))
    return model.chat(asked).message.content


def httpx(job) -> str:
    import httpx

    headers = {"Authorization": f"Bearer {job.key}"} if job.key else {}
    with http_client(job, httpx.Client) or httpx.Client() as client:
        with client.stream("POST", f"{job.url}/chat/completions", json=chat(job), headers=headers, timeout=60) as reply:
            body = "" if job.stream and reply.is_success else reply.read()
            reply.raise_for_status()
            if body:
                return json.loads(body)["choices"][0]["message"]["content"]
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def options(job) -> dict:
    """Where, with which key, and how often: as the openai package calls it, and most after it.

    They all insist on a key: who has none must blank the header.
    """
    headers = None if job.key else {"Authorization": ""}
    return {"base_url": job.url, "api_key": job.key or "-", "default_headers": headers, "max_retries": job.retries}


def http_client(job, kind):
    return kind(verify=ssl.create_default_context(cafile=job.cafile)) if job.cafile else None


def chat(job) -> dict:
    return {"model": MODEL, "messages": messages(job), "stream": job.stream}


def messages(job) -> list[dict]:
    picture = {"type": "image_url", "image_url": {"url": job.picture}}
    return [{"role": "user", "content": [{"type": "text", "text": job.question}, picture]}]


def content(job) -> bytes:
    return base64.b64decode(job.picture.partition(",")[2])


def delta(chunk) -> str:
    return chunk.choices[0].delta.content or "" if chunk.choices else ""


def raised(error: Exception) -> dict:
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    message = response.text if type(error).__name__ == "HTTPStatusError" else str(error)  # httpx leaves it to be read
    return {"error": type(error).__name__, "status": status, "message": message}


if __name__ == "__main__":
    ask = globals()[sys.argv[1]]
    for line in sys.stdin:
        try:
            reply = {"text": ask(SimpleNamespace(**json.loads(line)))}
        except Exception as error:
            reply = raised(error)
        print(json.dumps(reply), flush=True)
