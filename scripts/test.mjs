#!/usr/bin/env node
// `npm test`: sets everything up, checks the types, runs the Jest suite. Arguments go to Jest.

import { spawnSync } from 'node:child_process'
import { main, npmPackages, root, run, ScriptError, step, tool } from './progress.mjs'
import { setup } from './setup.mjs'

await main(async () => {
  process.chdir(root)
  await setup()
  await npmPackages()
  await step(
    'types (tsc)',
    async () => void (await run(process.execPath, [tool('typescript', 'bin', 'tsc'), '-p', '.'])),
  )
  // The .mjs tests are real ES modules, for which Jest needs Node's module API.
  const jest = spawnSync(
    process.execPath,
    ['--experimental-vm-modules', '--no-warnings', tool('jest', 'bin', 'jest.js'), ...process.argv.slice(2)],
    { stdio: 'inherit' },
  )
  if (jest.status !== 0) throw new ScriptError('Tests failed')
})
