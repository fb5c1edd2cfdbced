#!/usr/bin/env node
// `npm run lint`: formatting and static checks of everything, without building the guest.

import { main, npmPackages, root, run, step, tool } from './progress.mjs'

await main(async () => {
  process.chdir(root)
  await npmPackages()
  await step('rustfmt', async () => void (await run('cargo', ['fmt', '--all', '--check'])))
  await step(
    'prettier',
    async () => void (await run(process.execPath, [tool('prettier', 'bin', 'prettier.cjs'), '--check', '.'])),
  )
  await step(
    'types (tsc)',
    async () => void (await run(process.execPath, [tool('typescript', 'bin', 'tsc'), '-p', '.'])),
  )
  await step('clippy', async (note) => {
    const args = ['clippy', '--workspace', '--all-targets', '--locked', '--', '-D', 'warnings']
    await run('cargo', args, { onLine: (line) => note(line.trim()) })
  })
})
