'use strict'
/**
 * Snapshots go from one backend to the other. `npm run test:kvm` runs this file three times: under the software CPU, which
 * leaves a snapshot; under KVM, which goes on from it and leaves two; and under the software CPU again. Alone it
 * goes on from a snapshot of its own.
 */
const { cpSync, existsSync, readFileSync, writeFileSync } = require('node:fs')
const path = require('node:path')
const { ownStore } = require('./support')
const { plant, examine } = require('./witness')

/** Directory of a store that such a run left, with this file in it. */
const FROM = process.env.AMBERBOX_PORTABLE_FROM
/** Where to leave one. */
const TO = process.env.AMBERBOX_PORTABLE_TO
const RECORDS = 'portable.json'

const store = ownStore()
const records = FROM ? JSON.parse(readFileSync(path.join(FROM, RECORDS), 'utf8')) : []
const made = []

beforeAll(() => {
  if (FROM) cpSync(FROM, store.home, { recursive: true })
})

/** Freezes a sandbox of which `facts` are true. */
async function freeze(sandbox, facts) {
  const { snapshotId } = await sandbox.createSnapshot()
  return { snapshotId, facts }
}

test('the backend that was asked for is the one that runs', async () => {
  const sandbox = await store.create()
  const { backend, backendReason } = await sandbox.getInfo()
  expect({ backend, backendReason }).toEqual({
    backend: process.env.AMBERBOX_BACKEND || backend,
    backendReason: expect.stringMatching(/./),
  })
})

test('processes, memory and files go on in a copy', async () => {
  const source = await store.create()
  const record = await freeze(source, await plant(source))
  // The source goes on too, and both are examined while the other runs.
  const copy = await store.create(record.snapshotId)
  await Promise.all([examine(source, record.facts), examine(copy, record.facts)])
  made.push(record)
})

const frozen = records.map(({ snapshotId, facts }, i) => [i, facts.backend, facts.hops ?? 0, snapshotId])
if (frozen.length > 0) {
  test.each(frozen)('snapshot %i, made under %s after %i moves, goes on here', async (i) => {
    const { snapshotId, facts } = records[i]
    const copies = [await store.create(snapshotId), await store.create(snapshotId)]
    // Each copy from the same moment: what one does, the other does not see.
    const now = await examine(copies[0], facts)
    await examine(copies[1], facts)
    const { stdout } = await copies[1].commands.run(
      'python3 -c "print(sum(i * i for i in range(1000)))"; hostname; date +%s',
    )
    const [sum, host, time] = stdout.split('\n')
    expect([sum, host]).toEqual(['332833500', copies[1].sandboxId])
    expect(Math.abs(Number(time) - Date.now() / 1000)).toBeLessThan(30)
    made.push(await freeze(copies[0], { ...now, hops: (facts.hops ?? 0) + 1 }))
  })
}

if (TO) {
  test('leaves its snapshots to the next run', () => {
    expect(made).toHaveLength(records.length + 1)
    expect(existsSync(TO)).toBe(false)
    cpSync(store.home, TO, { recursive: true })
    writeFileSync(path.join(TO, RECORDS), JSON.stringify(made))
  })
}
