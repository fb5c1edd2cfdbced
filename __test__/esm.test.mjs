/** The same from an ES module, as the README shows it. */
import { afterAll, expect, test } from '@jest/globals'
import { Sandbox } from '../index.mjs'

const made = []
afterAll(() => Promise.all(made.map((sandbox) => sandbox.kill())))

test('the example of the README', async () => {
  const sandbox = await Sandbox.create({ metadata: { job: '42' } })
  made.push(sandbox)
  await sandbox.commands.run('echo ready > /tmp/status.txt')
  const snapshot = await sandbox.createSnapshot()
  const copies = await Promise.all([1, 2].map(() => Sandbox.create(snapshot.snapshotId)))
  made.push(...copies)
  expect((await copies[0].commands.run('cat /tmp/status.txt')).stdout).toBe('ready\n')
  const found = []
  for (const p = Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId, limit: 20 }); p.hasNext;) {
    found.push(...(await p.nextItems()))
  }
  expect(found).toEqual([snapshot])
  await Promise.all([sandbox, ...copies].map((s) => s.kill()))
  expect(await Sandbox.deleteSnapshot(snapshot.snapshotId)).toBe(true)
  expect(await Sandbox.deleteSnapshot(snapshot.snapshotId)).toBe(false)
})
