// Drives the given client for a test in another language: an order a line in, an answer a line out.
// Usage: node driver.mjs ENDPOINT FD. Answers go to that descriptor, as the client logs to stdout. Bytes are
// {$bytes: base64}, undefined is {$undefined: true}; anything that JSON cannot hold otherwise is answered as
// {$strange: ...}, which no test accepts.
import fs from "node:fs";
import readline from "node:readline";
import { createClient } from "@rivet-dev/agentos/client";

const [endpoint, answers] = process.argv.slice(2);
const clients = new Map();
const connections = new Map();
const listeners = new Map();

const say = (message) => fs.writeSync(Number(answers), JSON.stringify(message) + "\n");

const marked = (value) => {
  if (value === undefined) return null;
  if (value instanceof Uint8Array) return { $bytes: Buffer.from(value).toString("base64") };
  if (value === null || ["string", "boolean"].includes(typeof value)) return value;
  if (typeof value === "number") return Number.isFinite(value) ? value : { $strange: String(value) };
  if (Array.isArray(value)) return value.map(marked);
  const plain = typeof value === "object" && [Object.prototype, null].includes(Object.getPrototypeOf(value));
  if (!plain) return { $strange: `${typeof value} ${value?.constructor?.name} ${String(value)}` };
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, marked(one)]));
};

const unmarked = (value) => {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.map(unmarked);
  if ("$bytes" in value) return new Uint8Array(Buffer.from(value.$bytes, "base64"));
  if ("$undefined" in value) return undefined;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, unmarked(one)]));
};

const handleOf = ({ encoding, kind, key }) => {
  if (!clients.has(encoding)) {
    // bare is what it does by itself: that client is made as a program makes it
    clients.set(encoding, createClient(encoding === "bare" ? { endpoint } : { endpoint, encoding }));
  }
  return clients.get(encoding)[kind].getOrCreate(key);
};

const connectionOf = (place) => {
  const name = `${place.encoding} ${place.kind} ${place.key}`;
  if (!connections.has(name)) connections.set(name, handleOf(place).connect());
  return connections.get(name);
};

const orders = {
  async call({ action, args, connected, ...place }) {
    const target = connected ? connectionOf(place) : handleOf(place);
    let owner = target;
    const names = action.split(".");
    const last = names.pop();
    for (const name of names) owner = owner[name];
    return owner[last](...args);
  },
  async listen({ listener, events, connected, ...place }) {
    const connection = connected ? connectionOf(place) : handleOf(place).connect();
    const off = events.map((event) =>
      connection.on(event, (payload) => say({ event, listener, payload: marked(payload) })));
    await connection.exec("true");
    listeners.set(listener, async () => {
      off.forEach((one) => one());
      if (!connected) await connection.dispose();
    });
  },
  async silence({ listener }) {
    await listeners.get(listener)();
    listeners.delete(listener);
  },
  async destroy({ connected, ...place }) {
    const name = `${place.encoding} ${place.kind} ${place.key}`;
    if (connections.has(name)) await connections.get(name).dispose();
    connections.delete(name);
    await handleOf(place).destroy();
  },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { id, order, ...what } = JSON.parse(line);
  orders[order](unmarked(what)).then(
    (value) => say({ id, value: marked(value) }),
    (error) => say({
      id,
      error: { code: `${error.group}.${error.code}`, message: error.message, metadata: marked(error.metadata) },
    }),
  );
}
await Promise.all([...clients.values()].map((client) => client.dispose()));
process.exit(0);
