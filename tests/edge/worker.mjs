// Runs the worker of edge/cloudflare in workerd, with a KV namespace and an origin.
//
//     node worker.mjs '{"script": …, "port": …, "adminPort": …, "origin": …, "bindings": {…}}'
//
// `fetch` of the worker goes to `origin`, as a worker's on a route does. At `adminPort` the namespace can be written, as
// the stub of Cloudflare's API does: PUT / with [[name, value], …], DELETE / with [name, …], GET /{name}; and GET / says
// what the worker logged.

import { createServer } from "node:http";
import { Log, LogLevel, Miniflare, Response } from "miniflare";

const settings = JSON.parse(process.argv[2]);
const logged = [];

const miniflare = new Miniflare({
  modules: true,
  scriptPath: settings.script,
  compatibilityDate: "2025-07-01",
  host: "127.0.0.1",
  port: settings.port,
  kvNamespaces: ["KEYS"],
  bindings: settings.bindings,
  log: new Log(LogLevel.NONE),
  handleRuntimeStdio(stdout, stderr) {
    stdout.on("data", (text) => logged.push(String(text)));
    stderr.on("data", (text) => logged.push(String(text)));
  },
  async outboundService(request) {
    const { pathname, search } = new URL(request.url);
    const asked = { method: request.method, redirect: "manual" };
    const answer = await fetch(settings.origin + pathname + search, asked);
    const body = [204, 304].includes(answer.status) ? null : await answer.arrayBuffer();
    return new Response(body, { status: answer.status, headers: [...answer.headers] });
  },
});
await miniflare.ready;
const keys = await miniflare.getKVNamespace("KEYS");

async function administer(request) {
  if (request.method === "GET" && request.url === "/") return logged.join("");
  if (request.method === "GET") return (await keys.get(decodeURIComponent(request.url.slice(1)))) ?? null;
  let text = "";
  for await (const chunk of request) text += chunk;
  const given = JSON.parse(text);
  const put = ([name, value]) => keys.put(name, value);
  await Promise.all(given.map(request.method === "PUT" ? put : (name) => keys.delete(name)));
  return "";
}

const admin = createServer(async (request, response) => {
  try {
    const said = await administer(request);
    response.writeHead(said === null ? 404 : 200).end(said ?? "");
  } catch (error) {
    response.writeHead(500).end(String(error));
  }
});
admin.listen(settings.adminPort, "127.0.0.1");

process.on("SIGTERM", async () => {
  admin.close();
  await miniflare.dispose();
  process.exit(0);
});
