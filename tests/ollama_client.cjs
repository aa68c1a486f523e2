// Rounds through Ollama's client for JavaScript: `node ollama_client.cjs FOLDER URL` prints "ok"; FOLDER has node_modules.

const assert = require("node:assert/strict")
const { createRequire } = require("node:module")

const [folder, host] = process.argv.slice(2)
const { Ollama } = createRequire(`${folder}/package.json`)("ollama")
const ollama = new Ollama({ host })
const user = (content) => ({ role: "user", content })
const tools = [{ type: "function", function: { name: "Bash", description: "Runs a command.", parameters: {
  type: "object", properties: { command: { type: "string" } }, required: ["command"] } } }]

async function pieces(stream) {
  const all = []
  for await (const piece of stream) all.push(piece)
  return all
}

async function rounds() {
  const model = "demo"
  assert.equal((await ollama.chat({ model, messages: [user("say hello")] })).message.content, "hello")
  const counted = await pieces(await ollama.chat({ model, messages: [user("count to 9")], stream: true }))
  assert.equal(counted.map((piece) => piece.message.content).join(""), "1 2 3 4 5 6 7 8 9")
  assert.equal(counted.at(-1).done_reason, "stop")
  const written = await pieces(await ollama.generate({ model, prompt: "say a b c", stream: true }))
  assert.equal(written.map((piece) => piece.response).join(""), "a b c")

  const asked = [user("run ls")]
  const streamed = await pieces(await ollama.chat({ model, messages: asked, tools, stream: true }))
  const whole = await ollama.chat({ model, messages: asked, tools })
  for (const message of [whole.message, streamed.map((piece) => piece.message).find((message) => message.tool_calls)]) {
    assert.deepEqual(message.tool_calls.map((call) => [call.function.name, call.function.arguments]), [["Bash", { command: "ls" }]])
    const result = { role: "tool", content: "a.txt", tool_name: "Bash" }
    const answer = await ollama.chat({ model, messages: [...asked, message, result], tools })
    assert.equal(answer.message.content, "The tool answered: a.txt")
  }

  const thought = await ollama.chat({ model, messages: [user("think then say hello")], think: true })
  assert.ok(thought.message.thinking && thought.message.content === "hello")
  assert.deepEqual((await ollama.list()).models.map((one) => one.name), ["demo:latest"])
  assert.ok((await ollama.show({ model })).capabilities.includes("tools"))
  await assert.rejects(ollama.chat({ model: "nope", messages: asked }), { status_code: 404, error: "model 'nope' not found" })
  const stopped = ollama.generate({ model, prompt: "say " + "word ".repeat(20000), stream: true })
  await stopped.then((stream) => stream.abort())
  assert.ok((await ollama.ps()).models.length)
}

rounds().then(() => console.log("ok"), (error) => { console.error(error); process.exitCode = 1 })
