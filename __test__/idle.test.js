'use strict'
// What an idle guest does: nothing. (How little CPU that is, `npm run bench` measures.)

const { ownStore } = require('./support')

const store = ownStore()

test('an idle guest has no periodic timers', async () => {
  const sandbox = await store.create()
  const setting = await sandbox.commands.run('cat /proc/sys/vm/compaction_proactiveness')
  expect(setting.stdout).toBe('0\n')
  // Timer interrupts of four idle seconds. The periodic tick would be 400 of them.
  const count = "awk '/^ *LOC:/ { print $2 }' /proc/interrupts"
  const { stdout } = await sandbox.commands.run(`sleep 1; a=$(${count}); sleep 4; echo $(($(${count}) - a))`)
  expect(Number(stdout)).toBeGreaterThan(0)
  expect(Number(stdout)).toBeLessThan(100)
  await sandbox.kill()
})
