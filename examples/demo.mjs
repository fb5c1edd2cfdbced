// The README's example, with a line for each thing it does: prepare a sandbox once, freeze it, start copies of it.
import { Sandbox } from '../index.mjs'

/** Runs one step and prints what it did and how long it took. */
async function timed(what, body) {
  const began = performance.now()
  const result = await body()
  const ms = performance.now() - began
  console.log(`${what.padEnd(62)} ${ms < 1000 ? `${ms.toFixed(1)} ms` : `${(ms / 1000).toFixed(2)} s`}`)
  return result
}

const sandbox = await timed('Sandbox.create()', () => Sandbox.create({ metadata: { job: '42' } }))
const { backend, backendReason } = await sandbox.getInfo()
console.log(`  id ${sandbox.sandboxId}, backend ${backend}: ${backendReason}`)

await timed('run: python3 -m venv /tmp/v && echo ready > /tmp/status.txt', () =>
  sandbox.commands.run('python3 -m venv /tmp/v && echo ready > /tmp/status.txt'),
)

const snapshot = await timed('createSnapshot(): the sandbox goes on running', () => sandbox.createSnapshot())
console.log(`  snapshot ${snapshot.snapshotId}`)

const copies = await timed('Sandbox.create(snapshot) twice, at the same time', () =>
  Promise.all([1, 2].map(() => Sandbox.create(snapshot.snapshotId))),
)
const { stdout } = await timed('run in the first copy: cat /tmp/status.txt', () =>
  copies[0].commands.run('cat /tmp/status.txt'),
)
console.log(`  ${stdout.trim()}`)

for (const pages = Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId, limit: 20 }); pages.hasNext;) {
  console.log('  snapshots of it:', await pages.nextItems())
}

await timed('kill all three', () => Promise.all([sandbox, ...copies].map((s) => s.kill())))
const deleted = await timed('deleteSnapshot()', () => Sandbox.deleteSnapshot(snapshot.snapshotId))
const again = await Sandbox.deleteSnapshot(snapshot.snapshotId)
console.log(`  deleted: ${deleted}, and a second time: ${again}`)
