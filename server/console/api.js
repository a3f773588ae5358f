// What the server is asked; every call throws a `Refusal` or an `Unreachable`.

/** The server answered with an error. */
export class Refusal extends Error {
  constructor(status, code, text) {
    super(text);
    [this.status, this.code] = [status, code];
  }
}

/** The server did not answer. */
export class Unreachable extends Error {}

/** Asks for a path and returns the response, also one with an error status. */
export async function ask(path, options = {}) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    throw new Unreachable(`the server does not answer (${error.message})`);
  }
}

export async function refusalOf(response) {
  const body = await response.json().catch(() => ({}));
  return new Refusal(response.status, body.code ?? "error", body.error ?? `HTTP status ${response.status}`);
}

async function ok(path, options) {
  const response = await ask(path, options);
  if (!response.ok) throw await refusalOf(response);
  return response;
}

const part = encodeURIComponent;
const json = async (path, options) => (await ok(path, options)).json();

export const server = () => json("/v2");
export const index = () => json("/v2/repository/index", { method: "POST" });
export const metrics = async () => (await ok("/metrics")).text();
export const modelPath = (name, version) => `/v2/models/${part(name)}/versions/${part(version)}`;
export const metadata = (name, version) => json(modelPath(name, version));
export const evidencePath = (name, version, file) => `/console/evidence/${part(name)}/${part(version)}/${file}`;
export const control = (name, action) => ok(`/v2/repository/models/${part(name)}/${action}`, { method: "POST" });

/** Whether the server takes requests, as `{ ready, error, models, lanes_down }`. */
export const health = async () => (await ask("/v2/health/ready")).json();

/** The manifest of a version; `null` for a plain model, which has none. */
export async function manifest(name, version) {
  const response = await ask(evidencePath(name, version, "manifest.json"));
  if (response.status === 404) return null;
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}
