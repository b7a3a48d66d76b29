// One answer of POST /v1/chat/completions as it comes: server-sent events to plain objects.

/** The data of each event, parsed; ends at [DONE]. Comments (heartbeats) are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server closed the stream before its end");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** The error sentence of an answer that is not 200. */
async function problem(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return error.message ?? String(error);
  } catch {
    return text.slice(0, 300) || `the server answered ${response.status}`;
  }
}

/** Ask the server; `report(kind, text)` gets "thinking" and "content". Returns {usage, finish, first, last}, in ms. */
export async function ask(request, key, signal, report) {
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw Object.assign(new Error(await problem(response)), { status: response.status });
  const result = { usage: null, finish: null, first: null, last: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message ?? "the server failed while it answered");
    result.usage = event.usage ?? result.usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    result.finish = choice.finish_reason ?? result.finish;
    const { content, reasoning_content: thinking } = choice.delta;
    if (!content && !thinking) continue;
    result.last = performance.now() - began;
    result.first ??= result.last;
    if (thinking) report("thinking", thinking);
    if (content) report("content", content);
  }
  return result;
}
